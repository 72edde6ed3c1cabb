"""Run folders: the ledger, the environment, how units ended."""
