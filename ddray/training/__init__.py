"""Training networks: the engine, recipes, augmentation."""
