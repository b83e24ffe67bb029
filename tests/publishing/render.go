// Executes the template in the file that the first argument names, as Ollama does, for each conversation of
// the JSON list on standard input; writes the texts as a JSON list.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type values struct {
	System   string
	Messages []*struct{ Role, Content string }
}

func main() {
	source, err := os.ReadFile(os.Args[1])
	check(err)
	parsed, err := template.New("").Option("missingkey=zero").Parse(string(source))
	check(err)
	var conversations []values
	check(json.NewDecoder(os.Stdin).Decode(&conversations))
	texts := []string{}
	for _, conversation := range conversations {
		var text strings.Builder
		check(parsed.Execute(&text, map[string]any{
			"System": conversation.System, "Messages": conversation.Messages, "Response": "",
		}))
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
