"""What leaves the house: exported models and their predictions, champions, texts as a data set."""
