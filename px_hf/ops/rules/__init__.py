"""Path rules, one family of operations a file. Importing a family fills the table `px_hf.ops.registry.RULES`."""
