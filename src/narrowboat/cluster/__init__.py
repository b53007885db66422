"""Several machines: tasks placed on the nodes of a Ray cluster, models split over them, data sets swept by them."""
