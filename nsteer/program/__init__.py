"""What runs in a model: ops, poolings, the form of a program, its text, and the anatomy of the models it runs in."""
