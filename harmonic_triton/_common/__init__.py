"""What both halves stand on: checks of arguments, choice of a backend, precision of products, files."""
