"""An explainer without hooks, for compilers and for runtimes without Python."""
