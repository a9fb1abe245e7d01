"""The study of the forms of knowledge: every loss and every way of teaching on one small pair of networks."""
