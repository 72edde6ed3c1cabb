"""Generators that are trained on all real images; a set is samples of them."""
