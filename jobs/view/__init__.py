"""`laion-rdm view`: a page with pictures and refused rows of a data set, for looking at it."""
