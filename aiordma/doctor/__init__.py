"""``python -m aiordma doctor``: whether RDMA works here, and to a peer; for each thing wrong, its remedy.

`facts` looks, `checks` judges, `trial` tries, `report` says it.
"""
