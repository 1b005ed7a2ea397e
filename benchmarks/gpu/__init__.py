"""`make gpu-day`: all that is to be measured on one CUDA GPU, in half an hour, row by row."""
