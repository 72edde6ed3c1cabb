"""A search for hyperparameters, without Ray: space, trials, study, finals."""
