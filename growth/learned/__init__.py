"""Methods that learn: the large model as a function of a few parameters, trained on its own loss."""
