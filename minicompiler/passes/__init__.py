"""Graph passes: each takes a Function and the Context and gives the changed Function."""
