"""Pictures: grids of images, t-SNE planes, parts of plots."""
