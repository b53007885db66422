// Everything begins.

theme.start();
api.start();
startHeader();
startMemoryChart();
startResponses();
startGantt();
startPlanView();
startBudget();
startWhatIf();
startTasks();
startTrial();
followEvents((event) => run.hear(event), (linked, why) => run.link(linked, why));
