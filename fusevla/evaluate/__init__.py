"""What a trained model is worth: held-out figures and pictures of a run."""
