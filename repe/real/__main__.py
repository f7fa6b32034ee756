from repe.real import main

if __name__ == "__main__":
    main()
