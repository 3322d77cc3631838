"""Parts of the benchmarks of fleets: simulated actors, the processes that they run in, and a scripted learner."""
