"""Private: what turns the crank of a step. It takes the stages that it is given, never a Step."""
