"""Class names of published data sets, one a line in the order of their ids."""
