"""Programs of the repository, not installed.

A script is a file, or a folder with a `__main__.py`. A package, so that the files of a
folder can import one another, and no installed package named `scripts` hides them.
"""
