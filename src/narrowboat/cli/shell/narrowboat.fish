# fish completion for narrowboat: asks the program itself what could come next.

function __narrowboat_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program (string replace -r '^~' "$HOME" -- $words[1])
    for line in ($program __complete $words[2..-1] "$current" 2>/dev/null)
        switch $line
            case ':files'
                __fish_complete_path "$current"
            case ':folders'
                __fish_complete_directories "$current" folder
            case '*'
                echo -- $line
        end
    end
end

complete --command narrowboat --no-files --arguments '(__narrowboat_complete)'
