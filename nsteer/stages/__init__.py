"""The labelled grid of the work of a study: its cells, the forms of its programs, its arrays, its size."""
