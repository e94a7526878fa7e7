"""Training recipes, one for each `lungwatch train` command."""
