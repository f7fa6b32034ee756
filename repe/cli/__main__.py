from repe.cli import main

if __name__ == "__main__":
    main()
