"""Functions of other code bases, by their names and arguments: one file an ecosystem."""
