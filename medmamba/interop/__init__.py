"""Exchange with other projects: their networks, checkpoints, plans and folders."""
