// Renders conversations with Go's own text/template, as Ollama hands them to a Modelfile's TEMPLATE.
//
//	go run tools/ollama_template/main.go < cases.json > rendered.json
//
// In: a list of {"template": text, "conversations": [[{"role", "content"}, ...], ...]}; out: a list of lists of texts.
// Turns of one role in a row become one, with an empty line between, as Ollama does before it renders.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type task struct {
	Template      string      `json:"template"`
	Conversations [][]message `json:"conversations"`
}

func collated(given []message) (string, []*message) {
	var system []string
	var out []*message
	for number := range given {
		one := given[number]
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if len(out) > 0 && out[len(out)-1].Role == one.Role {
			out[len(out)-1].Content += "\n\n" + one.Content
		} else {
			out = append(out, &one)
		}
	}
	return strings.Join(system, "\n\n"), out
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	var tasks []task
	check(json.NewDecoder(os.Stdin).Decode(&tasks))
	rendered := [][]string{}
	for _, one := range tasks {
		parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
		check(err)
		texts := []string{}
		for _, given := range one.Conversations {
			system, messages := collated(given)
			var text strings.Builder
			check(parsed.Execute(&text, map[string]any{"System": system, "Messages": messages, "Response": ""}))
			texts = append(texts, text.String())
		}
		rendered = append(rendered, texts)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	check(encoder.Encode(rendered))
}
