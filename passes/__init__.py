"""The passes: graph in, graph out, one file each, found by file name."""
