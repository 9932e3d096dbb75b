"""Lightning CLI recipes; ``zoo fit --config digits/dinat`` runs one by name."""
