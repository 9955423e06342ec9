"""The two IRs (dataflow graph, loop nest), the expression language they share, and what reads
them."""
