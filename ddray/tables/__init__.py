"""`ddray bench`: a paper's table as a graph of units (pool -> distil -> evaluate); nothing here needs Ray."""
