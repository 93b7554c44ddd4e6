"""mmfix inside other evaluation harnesses. Each plug-in imports its harness only when that harness loads it."""
