"""Records to text and to the tokens that are trained."""
