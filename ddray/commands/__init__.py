"""The functions behind the commands of `ddray`; `ddray.cli` registers them."""
