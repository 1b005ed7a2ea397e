"""`python -m jobs.demo RECIPE`, see `jobs.demo.run`."""

if __name__ == "__main__":
    # Imported here: each process that draws pictures imports this module first.
    from jobs.demo.run import main

    main()
