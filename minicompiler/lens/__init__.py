"""Looking into a compilation: what every stage did (explain), and which one went wrong (verify)."""
