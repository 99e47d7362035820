"""The losses in other people's models. Nothing here is imported with the package: each module asks for what it needs."""
