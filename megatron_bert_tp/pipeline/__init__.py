"""Pipeline parallelism: schedules as data, their simulation and drawing, the cut into stages, execution."""
