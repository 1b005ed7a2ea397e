"""The tabs of the explore page: search, make a picture, compare styles; their widgets and HTML views."""
