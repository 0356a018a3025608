"""The dylora binary, started with the libtorch of the installed PyTorch (`__main__`)."""
