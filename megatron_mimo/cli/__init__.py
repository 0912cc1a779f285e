"""The command line: from a recipe and a folder to a model that is trained, evaluated and exported."""
