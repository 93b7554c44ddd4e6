from mmfix_app.cli import main

raise SystemExit(main())
