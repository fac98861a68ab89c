"""What every stage stands on: the domain file, the stage, features and tables as stages keep them."""
