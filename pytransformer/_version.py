"""The version, in a module that imports nothing: setup.py and csrc/build.py read it too."""

__version__ = "0.1.0"
