"""What is to be learned of an image, in one form: a class, several labels or numbers; and weights of rare classes."""
