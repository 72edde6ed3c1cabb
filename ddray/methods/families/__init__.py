"""What several methods share, one family a module or package."""
