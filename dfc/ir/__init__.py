"""The dataflow graph: types, values, nodes, and what may be asked of them."""
