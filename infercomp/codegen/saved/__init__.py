"""Programs as plain data, and back: what a saved model holds beside its weights."""
