"""What says whether a result is right: the fp64 oracle, the accuracy rule, random problems, races."""
